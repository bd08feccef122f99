"""A CheckpointConversion becomes an Indexed Job, and the Job its status::

    CheckpointConversion, Job --kopf: handlers--.
    Pod ----------------------------- informer --+--> store --> workqueue --> reconcile --> API server
    worker:8080/progress ------------ progress --'                               |
                                                                       rules: pure; it decides

kopf is transport: there is no finalizer, no webhook and no annotation of kopf's on any object, and after a restart
everything goes on where it was.
"""
