"""Everything the operator decides, without a cluster.  Pure::

raw Job, Pod, claim --views--> Seen --plan--> Plan: status, actions, when to look again
stages      conditions         notes: the events
"""
