"""What a person sees::

a checkpoint         --checkpoint--> what it holds, from its headers     (ckpt2pt inspect)
a conversion to come --preview-----> what it would do, from headers      (ckpt2pt plan)
one under way        --progress----> bars on a terminal, JSON lines elsewhere
"""
