"""The ``.pt`` side: torch's archive, the pickles inside it, and the trees that Megatron keeps there.

StagePlan, Template --payload--> tree --pickles--> bytes --archive--> where each record lies
file.pt --reader--> records --pickles--> tree        nothing that a file names is ever imported or called
"""
