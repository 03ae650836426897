"""Studies: questions of the papers, answered by small runs on data that needs no download.

    python -m repvgg_jax.studies.ablation      # RepVGG's Tables 6 and 7
    python -m repvgg_jax.studies.quantization  # int8, by block and by method

Results are lines of JSON, one per run, so that a study goes on where it was interrupted.
"""
