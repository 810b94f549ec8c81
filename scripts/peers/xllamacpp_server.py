"""The llama.cpp server inside xllamacpp, in a process of its own, by the names that llama-server's options have.

Knows only the options that `engines` gives. Ends when its input does.
"""

from __future__ import annotations

import argparse
import sys


def main() -> None:
    import xllamacpp as x

    parser = argparse.ArgumentParser()
    for name in ("model", "host", "fit", "spec-type", "spec-draft-model"):
        parser.add_argument(f"--{name}")
    for name in ("ctx-size", "parallel", "cache-ram", "threads", "threads-batch", "port", "gpu-layers", "verbosity"):
        parser.add_argument(f"--{name}", type=int, required=True)
    for name in ("spec-draft-n-max", "spec-draft-threads"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--spec-synth-len", type=float)
    args = parser.parse_args()

    params = x.CommonParams()
    params.model.path = args.model
    params.n_ctx, params.n_parallel, params.cache_ram_mib = args.ctx_size, args.parallel, args.cache_ram
    params.cpuparams.n_threads, params.cpuparams_batch.n_threads = args.threads, args.threads_batch
    params.hostnames, params.port = [args.host], args.port
    params.n_gpu_layers, params.fit_params, params.verbosity = args.gpu_layers, args.fit != "off", args.verbosity
    if args.spec_draft_model:
        params.speculative.types = [x.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_DFLASH]
        draft = params.speculative.draft
        draft.mparams.path, draft.n_max = args.spec_draft_model, args.spec_draft_n_max
        draft.cpuparams.n_threads = draft.cpuparams_batch.n_threads = args.spec_draft_threads
    if args.spec_synth_len is not None:
        params.speculative.synth_len = args.spec_synth_len
    server = x.Server(params)
    sys.stdin.read()
    del server


if __name__ == "__main__":
    main()
