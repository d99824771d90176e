"""`usage.md` of a release folder: about ten lines of code a format, run from that folder (tests run each of them)."""

from __future__ import annotations

from collections.abc import Sequence

from medsam2.export.run import file_stem
from medsam2.model.build import LoadedModel

HEAD = """# Using this release

SAM {version} `{name}` at {side} px in {count} formats. All code is run from this folder; images are RGB `uint8`, CT and
MR windowed as in training. `sha256sum -c SHA256SUMS` checks the files, the README.md of each format has more.
"""
SNIPPETS = {
    "sam2": """## sam2: Meta's code

`pip install rf-sam-2`

```python
import os
import numpy as np
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from sam2.build_sam import build_sam2
from sam2.sam2_image_predictor import SAM2ImagePredictor

GlobalHydra.instance().clear()
with initialize_config_dir(os.path.abspath("sam2"), version_base="1.2"):
    predictor = SAM2ImagePredictor(build_sam2("{stem}.yaml", "sam2/{stem}.pt", device="cpu"))
predictor._bb_feat_sizes = [({quarter}, {quarter}), ({eighth}, {eighth}), ({sixteenth}, {sixteenth})]
predictor.set_image(np.zeros((200, 240, 3), np.uint8))
masks, scores, _ = predictor.predict(box=np.array([20, 20, 90, 80]), multimask_output=False)
```
""",
    "huggingface": """## huggingface: transformers

`pip install "transformers>=4.56" torch torchvision`

```python
import torch
from transformers import Sam2VideoModel, Sam2VideoProcessor

model = Sam2VideoModel.from_pretrained("huggingface").eval()
processor = Sam2VideoProcessor.from_pretrained("huggingface")
frames = torch.zeros(4, 3, 200, 240, dtype=torch.uint8)
session = processor.init_video_session(video=frames, inference_device="cpu")
processor.add_inputs_to_inference_session(session, frame_idx=0, obj_ids=[1], input_boxes=[[[20, 20, 90, 80]]])
model(session, frame_idx=0)
masks = {{seen.frame_idx: seen.pred_masks > 0 for seen in model.propagate_in_video_iterator(session)}}
```
""",
    "onnx": """## onnx: ONNX Runtime, without PyTorch

`pip install onnxruntime numpy`

```python
import json
import sys
from pathlib import Path
import numpy as np

sys.path.insert(0, "onnx")
from propagate import onnx_graphs, propagate

folder = Path("onnx")
prompts = [{{"object": 0, "frame": 1, "box": [20, 20, 90, 80]}}]
settings = json.loads((folder / "{stem}.json").read_text())
found = propagate(onnx_graphs(folder), settings, np.zeros((4, 200, 240), np.uint8), prompts)
masks = found["logits"] > 0  # [objects, T, H, W]
```
""",
    "torch": """## torch: torch.export, without the network's code

`pip install torch numpy`

```python
import torch

encoder = torch.export.load("torch/{stem}_encoder.pt2").module()
decoder = torch.export.load("torch/{stem}_decoder.pt2").module()
high_0, high_1, embed = encoder(torch.zeros(1, 3, {side}, {side}))
box, labels = torch.tensor([[[20.0, 20.0], [90.0, 80.0]]]), torch.tensor([[2.0, 3.0]])
nothing = torch.zeros(1, 1, {quarter}, {quarter}), torch.zeros(1)
masks, scores = decoder(embed, high_0, high_1, box, labels, *nothing)
best = masks[0, scores[0].argmax()] > 0
```
""",
    "adapter": """## adapter: peft, onto the base weights

`pip install rf-sam-2 peft`; `model` is a SAM 2 with the base weights that adapter/medsam2.json names

```python
import os
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from peft import PeftModel
from sam2.build_sam import build_sam2

GlobalHydra.instance().clear()
with initialize_config_dir(os.path.abspath("sam2"), version_base="1.2"):
    model = build_sam2("{stem}.yaml", None, device="cpu")  # None: give the path of the base weights
model = PeftModel.from_pretrained(model, "adapter").merge_and_unload()
```
""",
}
OTHER = """## {name}

See [its README.md]({name}/README.md).
"""


def usage_text(loaded: LoadedModel, names: Sequence[str]) -> str:
    """Markdown, a section a format in the order given; formats without lines of their own point to their card."""
    side = loaded.spec.image_size
    numbers = {"quarter": side // 4, "eighth": side // 8, "sixteenth": side // 16}
    said = {
        "stem": file_stem(loaded),
        "side": side,
        "name": loaded.spec.name,
        "version": loaded.spec.version,
        **numbers,
    }
    head = HEAD.format(count=len(names), **said)
    return "\n".join([head, *(SNIPPETS.get(name, OTHER).format(**{**said, "name": name}) for name in names)])
