"""Convert MindSpore training checkpoints into Megatron-LM checkpoints, one pipeline stage at a time.

    rank_3/*.ckpt --ckpt--> TensorRef  (file, dtype, shape, extents; payload unread)
                               |
                    mapping    |  language_model.encoder.layers.7.attention.qkv_proj.weight
                               v  language_model.encoder.layers.1.self_attention.query_key_value.weight  (stage 3)
    pt_meta/*.json  --plan--> RankPlan  (which bytes land where; nothing read yet)
                               |
                    run, pt    v  every byte read once, written once
                  iter_0000500/mp_rank_00_003/{model_optim_rng,distrib_optim}.pt
                               |
                    verify     v  a second, independent reading
                  latest_checkpointed_iteration.txt

Above ``RankPlan`` only headers are read; below it only bytes move.  Importing this package loads nothing else: no
numpy, no torch, no YAML.
"""

__version__ = "0.1.0"
