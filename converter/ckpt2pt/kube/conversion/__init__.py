"""A CheckpointConversion, from the document to the Job and back to its status.  Pure but for reading the file::

    conversion.yaml --document--> checked, with defaults --spec--> Conversion --job--> Indexed Job
                                                                       stages --status--> status of the document

``run -f`` and the operator use the same code.
"""
