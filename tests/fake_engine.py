"""An engine that answers as it is told: the command line's JSON has the text by prompt and the seconds of a token.

{"texts": {"1,2,3": [...]}, "prefill": s, "decode": s, "accept": n} and, to go wrong: "spin", "die".
"""

import json
import os
import sys

told = json.loads(sys.argv[1])
for line in sys.stdin:
    asked = json.loads(line)
    if "target" in asked:
        print(json.dumps({"version": "fake", "pid": os.getpid()}), flush=True)
        while told.get("spin"):
            pass
        continue
    if told.get("die"):
        print("no memory left", file=sys.stderr)
        sys.exit(3)
    n = asked["n_tokens"]
    if asked.get("budget") == 99:
        print(json.dumps({"error": "a budget is at most 63"}), flush=True)
        continue
    reply = {
        "ids": told["texts"][",".join(map(str, asked["ids"]))][:n],
        "n_prefilled": len(asked["ids"]),
        "prefill_seconds": told["prefill"] * len(asked["ids"]),
        "n_decoded": n,
        "decode_seconds": told["decode"] * n,
        "n_passes": n // told.get("accept", 1),
    }
    print(json.dumps(reply), flush=True)
