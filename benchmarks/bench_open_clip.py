"""open_clip's training step with a locked image tower: the usual tool, to be compared with."""

from __future__ import annotations

import math
import time

import torch
from torch import nn

from litune.towers.quiet import quiet_transformers


class OpenClipSteps:
    """open_clip's training step with a locked image tower, as open_clip_train's train_one_epoch takes it.

    The pictures are random pixels that lie in memory, on a GPU in the GPU's: reading, decoding and resizing them is not
    counted.
    """

    def __init__(
        self,
        folder: str,
        captions: list[str],
        batch_size: int,
        context: int,
        bfloat16: bool,
        *,
        image_tower: str = "vit_small_patch16_224",
        pretrained: bool = True,
        device: str = "cpu",
        rate: float = 5e-4,
    ) -> None:
        """`folder` holds the text tower and its tokenizer; where it isn't `pretrained`, its weights are drawn."""
        from open_clip import ClipLoss, CustomTextCLIP
        from open_clip.tokenizer import HFTokenizer
        from open_clip_train.precision import get_autocast

        torch.manual_seed(0)
        vision = {"timm_model_name": image_tower, "timm_model_pretrained": False, "timm_proj": "linear"}
        text = {"hf_model_name": folder, "hf_pooler_type": "mean_pooler", "hf_proj_type": "linear"}
        with quiet_transformers():
            self.model = CustomTextCLIP(384, vision, text | {"hf_model_pretrained": pretrained}, output_dict=True)
        self.model.lock_image_tower()
        self.model.train().to(device)
        self.loss = ClipLoss()
        named = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        groups = [
            {"params": [p for n, p in named if _exempt(n, p)], "weight_decay": 0.0},
            {"params": [p for n, p in named if not _exempt(n, p)], "weight_decay": 0.2},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), eps=1e-6)
        self.autocast = get_autocast("amp_bf16" if bfloat16 else "fp32", device_type=device)
        self.tokens = HFTokenizer(folder, context_length=context)(captions)
        self.pixels = torch.rand(batch_size, 3, 224, 224, device=device)
        self.size, self.step, self.device = batch_size, 0, device

    def __call__(self) -> float:
        """Take a step; returns its seconds."""
        begin = time.perf_counter()
        rows = torch.arange(self.step * self.size, (self.step + 1) * self.size) % len(self.tokens)
        self.take(self.pixels, self.tokens[rows].to(self.device))
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    def take(self, pixels: torch.Tensor, tokens: torch.Tensor) -> None:
        """The step with these pictures [B, 3, H, W] and their texts' tokens [B, L]."""
        self.optimizer.zero_grad()
        with self.autocast():
            losses = self.loss(**self.model(pixels, tokens), output_dict=True)
            loss = sum(losses.values())
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            self.model.logit_scale.clamp_(0, math.log(100))
        self.step += 1


def _exempt(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim < 2 or any(part in name for part in ("bn", "ln", "bias", "logit_scale"))
