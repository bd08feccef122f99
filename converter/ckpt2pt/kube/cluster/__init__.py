"""A CheckpointConversion made and watched through the API server, by a user or by a training that has just ended.

    connection (in a pod: its token; elsewhere: kubeconfig) --api--> create, get, patch --waiting--> exit code

Only ``kubeconfig`` needs the package kubernetes (extra ``[submit]``); in a pod the standard library is enough.
"""
