"""The benchmark: prompts, the ways of decoding that are compared, their figures, and what is written of them.

`prompts`, `figures` and `report` know nothing of how a run is made, so that other programs can be measured with the
same words. Nothing here needs matplotlib but `plots`, nor `datasets` but `prompts.from_dataset`.
"""
