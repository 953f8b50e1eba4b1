"""What `import iec` costs beyond an empty interpreter; the two alternate, so that a busy machine slows both.

python benchmarks/import_time.py --repetitions 40
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time

PROGRAMS = {"empty": "", "import iec": "import iec"}


def main() -> None:
    parser = argparse.ArgumentParser(description="Cost of `import iec`.")
    parser.add_argument("--repetitions", type=int, default=40)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    times: dict[str, list[float]] = {name: [] for name in PROGRAMS}
    for repetition in range(options.repetitions + 1):
        for name, program in PROGRAMS.items():
            begin = time.perf_counter()
            subprocess.run([sys.executable, "-c", program], check=True)
            if repetition:  # the first pair only warms the file cache
                times[name].append(1000 * (time.perf_counter() - begin))
    medians = {name: statistics.median(values) for name, values in times.items()}
    extra = statistics.median(after - before for before, after in zip(*times.values(), strict=True))
    if options.json:
        print(json.dumps({"milliseconds": medians, "extra_milliseconds": extra}))
        return
    for name, value in medians.items():
        print(f"{name:12} {value:7.1f} ms")
    print(f"{'difference':12} {extra:7.1f} ms (median of {options.repetitions} pairs)")


if __name__ == "__main__":
    main()
