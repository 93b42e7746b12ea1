"""The small policy of the main job: OpenVLA's interface in 0.4 M parameters, so that RL runs on a
laptop's CPU.

1. Three convolutions over the image and two coordinate channels; random ViTs of this size do not
   learn to localise.
2. The instruction, a sum of hashed word embeddings, scales and shifts the features (FiLM).
3. A spatial softmax: where is each feature? These places and the words pass through an MLP.
4. The 256 logits of a token are 16 numbers times a fixed cosine basis over the bins: what is learnt
   about one bin holds for its neighbours.

studies/demonstrate.py trains it by imitation; weights/tiny_vla is what came of that.
"""
import zlib
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from robots import openvla
from robots.openvla import ACTION_TOKENS, BINS


class TinyVLA(nn.Module):
    """Instruction and image -> logits of 8 x 7 tokens of 256 bins.

    size: pixels of the images, square; crop: (top, left, side) of the part that it looks at, None:
    all of it. norm_stats: action statistics by data set."""
    model_type, half_on_gpu = "tiny_vla", False     # bf16 would change what it does
    files: dict = {}

    def __init__(self, norm_stats: dict, channels: tuple[int, int, int] = (16, 32, 32),
                 width: int = 256, basis: int = 16, size: int = 64,
                 crop: tuple[int, int, int] | None = None):
        super().__init__()
        top, left, side = crop or (0, 0, size)
        if (size % 4 or side % 4 or side < 4 or size > 1024 or min(*channels, width, basis) < 1
                or min(top, left) < 0 or max(top, left) + side > size):
            raise ValueError(f"size={size}, crop={crop}: both sides must be multiples of 4, and "
                             "the crop lie within the image, of at most 1024 pixels; layers have "
                             "at least 1 channel")
        self.config = {"model_type": self.model_type, "channels": list(channels), "width": width,
                       "basis": basis, "size": size, "crop": crop}
        self.norm_stats, self.camera, (c1, c2, c3) = norm_stats, size, channels
        self.conv1, self.conv2 = nn.Conv2d(5, c1, 5, 2, 2), nn.Conv2d(c1, c2, 3, 2, 1)
        self.conv3 = nn.Conv2d(c2, c3, 3, 1, 1)
        self.words = nn.EmbeddingBag(256, 64, mode="sum", padding_idx=0)
        self.film = nn.Linear(64, 2 * c2)
        self.sharpness = nn.Parameter(torch.zeros(c3, 1))       # log of an inverse temperature
        self.fc1, self.fc2 = nn.Linear(2 * c3 + 64, width), nn.Linear(width, width)
        self.head = nn.Linear(width, ACTION_TOKENS * basis)
        nn.init.normal_(self.head.weight, std=0.1 / width ** 0.5)
        waves = (torch.pi * torch.arange(1, basis + 1, dtype=torch.float64)).float()
        # Its device is named: transformers can leave linspace deaf to `with torch.device(..)`
        bins = torch.linspace(0, 1, BINS, device=waves.device)
        self.register_buffer("cosines", 3 * torch.cos(waves[:, None] * bins), False)  # (basis, 256)
        self.register_buffer("pixel_grid", self._grid(side), False)             # (2, side, side)
        self.register_buffer("cell_grid", self._grid(side // 4).flatten(1).T, False)  # (cells, 2)
        self.to(memory_format=torch.channels_last)

    @staticmethod
    def _grid(n: int) -> torch.Tensor:
        line = torch.linspace(-1, 1, n)
        return torch.stack([line.expand(n, n), line[:, None].expand(n, n)])     # (2, n, n): x, y

    def frames(self, images):
        """Camera images uint8 (B, size, size, 3) -> (B, 1, size, size, 3)."""
        return images[:, None]

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor,
                pixel_values: torch.Tensor) -> torch.Tensor:
        """input_ids, attention_mask (B, L), pixel_values (B, 3, side, side) -> logits (B, 56, 256)
        float32."""
        words = self.words(input_ids * attention_mask)                          # (B, 64)
        x = torch.cat([pixel_values, self.pixel_grid.expand(len(pixel_values), -1, -1, -1)], 1)
        x = F.relu(self.conv1(x.contiguous(memory_format=torch.channels_last)))
        scale, shift = self.film(words)[..., None, None].chunk(2, 1)            # (B, c2, 1, 1)
        x = F.relu(self.conv2(x) * (1 + scale) + shift)                 # (B, c2, side/4, side/4)
        where = (self.conv3(x).flatten(2) * self.sharpness.exp()).softmax(-1)   # (B, c3, cells)
        places = (where @ self.cell_grid).flatten(1)                            # (B, 2 c3)
        h = F.relu(self.fc1(torch.cat([places, words], 1)))
        h = h + F.relu(self.fc2(h))                                             # (B, width)
        return (self.head(h).unflatten(1, (ACTION_TOKENS, -1)) @ self.cosines).float()

    def pixel_values(self, frames) -> torch.Tensor:
        """Frames uint8 (B, 1, size, size, 3) -> what lies in the crop, (B, 3, side, side) in
        [-1, 1], of the weights' dtype."""
        frames, size, weight = torch.as_tensor(frames), self.camera, self.head.weight
        assert frames.dtype == torch.uint8 and frames.shape[1:] == (1, size, size, 3), (
            f"frames must be uint8 (B, 1, {size}, {size}, 3), got {frames.dtype} {frames.shape}")
        top, left, side = self.config["crop"] or (0, 0, size)
        frames = frames[:, 0, top:top + side, left:left + side]
        pixels = frames.to(weight.device).permute(0, 3, 1, 2).float()           # channels-last
        return (pixels / 127.5 - 1).to(weight.dtype)

    def prompt_ids(self, instructions: str | list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Instructions -> right-padded hashed words and their mask, (B, L) int64 each; padding is
        0. Word order is lost."""
        texts = [instructions] if isinstance(instructions, str) else instructions
        rows = [torch.tensor([1 + zlib.crc32(word.encode()) % 255 for word in text.lower().split()])
                for text in texts]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(self.head.weight.device)
        return ids, (ids > 0).long()

    decode, encode = openvla.OpenVLA.decode, openvla.OpenVLA.encode
    save_pretrained = openvla.OpenVLA.save_pretrained

    def set_gradient_checkpointing(self, on: bool = True) -> None:
        raise ValueError("--gradient_checkpointing is for OpenVLA; TinyVLA's activations are small")

    @classmethod
    def described(cls, folder: Path, shapes: dict | None = None) -> "TinyVLA":
        """The policy of a checkpoint folder on the meta device, without weights; as OpenVLA's."""
        config = openvla.read_json(folder / "config.json")
        if config.pop("model_type", None) != cls.model_type:
            raise ValueError(f"{folder}/config.json is not a TinyVLA's; give another folder")
        shapes, stats = shapes or openvla.read_shapes(folder), openvla.action_statistics(folder)
        try:
            with torch.device("meta"):              # a damaged width would fill the memory
                model = cls(stats, **config)
        except (TypeError, ValueError, RuntimeError, ArithmeticError) as error:
            raise ValueError(f"{folder}/config.json does not describe a TinyVLA "
                             f"({' '.join(str(error).split())[:200]}); give a complete checkpoint"
                             ) from None
        openvla.check_shapes(model, shapes, folder)
        return model

    @classmethod
    def from_pretrained(cls, path: str | Path, dtype: torch.dtype = torch.float32,
                        device=None) -> "TinyVLA":
        """A folder written by `save_pretrained`; ValueError, one line, for anything else."""
        folder = Path(path)
        known = cls.described(folder)
        sizes = {name: x for name, x in known.config.items() if name != "model_type"}
        model = cls(known.norm_stats, **sizes)
        model.load_state_dict(openvla.read_weights(folder / "model.safetensors", torch.float32))
        return model.to(device or "cpu", dtype)
