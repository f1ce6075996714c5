"""Write the carried pictures: held-out scenes as PNG, with the true mask and a prompt for every object.

python training/make_assets.py hypersam/assets/scenes
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from hypersam.evaluate import prompts_for
from hypersam.scenes import make_scene

# Far from the numbers that evaluations count up from 0.
FIRST, COUNT = 9_000_000, 4


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(COUNT):
        scene = make_scene(FIRST + i)
        Image.fromarray(scene.image).save(folder / f"scene_{i}.png")
        objects = []
        for j, thing in enumerate(sorted(scene.objects, key=lambda o: -o.area)):
            name = f"scene_{i}_mask_{j}.png"
            Image.fromarray(thing.mask.astype(np.uint8) * 255).convert("1").save(folder / name)
            asked = prompts_for(thing)
            objects.append({"mask": name, "point": asked["point"].points[0], "box": asked["box"].box})
        about = {"seed": FIRST + i, "split": "held_out", "objects": objects}
        (folder / f"scene_{i}.json").write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
