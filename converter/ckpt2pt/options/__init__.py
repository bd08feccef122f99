"""From a command line, or a document, to a request::

declared: the flags  --asked-->  Spec  --resolve: what pt_meta and the source state-->  Request
"""
