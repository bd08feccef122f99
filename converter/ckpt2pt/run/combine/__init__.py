"""Merge data-parallel shards into one file for each (tp, pp), as MindSpore itself would have written it::

    flags --request_of--> Combination --combine--> rank_R/{name}_dp_merged.{ckpt|safetensors}

``convert`` needs none of this: it reads shards in place.
"""
