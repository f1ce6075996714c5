"""The library's own call in a process of its own, whenever ``load`` asks for it.

    python -m benchmarks.bare ARTIFACT PICTURE

Every line on standard input names what to time and for how many seconds: ``cached``, one click on a picture whose
embedding is held, or ``new``, the picture's embedding and a click. The answer is a line with the JSON list of
milliseconds. Decoding the picture's file and encoding the mask are the service's work and not in it.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np

from hypersam.images import decode_image
from hypersam.loading import load


def main() -> None:
    """Answer until standard input ends."""
    predictor = load(Path(sys.argv[1]))
    image = decode_image(Path(sys.argv[2]).read_bytes())
    click, inside = np.array([[128, 128]]), np.array([1])
    predictor.set_image(image)
    predictor.predict(click, inside, multimask_output=False)
    print("ready", flush=True)
    for line in sys.stdin:
        kind, seconds = line.split()
        times: list[float] = []
        until = time.perf_counter() + float(seconds)
        while not times or time.perf_counter() < until:
            began = time.perf_counter()
            if kind == "new":
                predictor.set_image(image)
            predictor.predict(click, inside, multimask_output=False)
            times.append(1000 * (time.perf_counter() - began))
        print(json.dumps(times), flush=True)


if __name__ == "__main__":
    main()
