"""A batched KV-cache sampler in plain PyTorch, for machines without a GPU."""

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.cache_utils import DynamicLayer

from drgrpo.types import Completion, OnFinish, Request, Sampling, no_callback


def uniforms(seed_B: list[int], count: int) -> np.ndarray:
    """[B, count] numbers in [0, 1), each a function of its row's seed and its column alone
    (SplitMix64, Steele 2014)."""
    golden, mix_1, mix_2 = (
        np.uint64(c) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
    )
    seed_B1 = np.array(seed_B, dtype=np.uint64)[:, None]
    with np.errstate(over="ignore"):
        z = seed_B1 * mix_2 + np.arange(1, count + 1, dtype=np.uint64) * golden
        z = (z ^ (z >> np.uint64(30))) * mix_1
        z = (z ^ (z >> np.uint64(27))) * mix_2
        z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(11)) * 2.0**-53


def draw(logits_BV: Tensor, uniform_B: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Token and its log-probability, [B] each, by inverting the cumulative distribution; the
    likeliest at temperature 0."""
    logprob_BV = torch.log_softmax(logits_BV.float() / (temperature or 1.0), dim=-1)
    if temperature == 0:
        token_B = logprob_BV.argmax(-1)
    else:
        cdf_BV = logprob_BV.double().exp().cumsum(-1)
        token_B = torch.searchsorted(cdf_BV, (uniform_B * cdf_BV[:, -1])[:, None], right=True)[:, 0]
        token_B = token_B.clamp(max=logits_BV.shape[1] - 1)
    return token_B, logprob_BV.gather(1, token_B[:, None])[:, 0]


class GrowingLayer(DynamicLayer):
    """A layer of the KV cache that grows by doubling: transformers' own copies all keys and values
    for every token."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.length, self.buffers = 0, [key_states[:, :, :0], value_states[:, :, :0]]
        end = self.length + key_states.shape[2]
        if end > self.buffers[0].shape[2]:
            for i, old in enumerate(self.buffers):
                new = old.new_empty(*old.shape[:2], max(2 * end, 32), old.shape[3])
                new[:, :, : self.length] = old[:, :, : self.length]
                self.buffers[i] = new
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, self.length : end] = states
        self.length = end
        self.keys, self.values = (buffer[:, :, :end] for buffer in self.buffers)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.length if self.is_initialized else 0

    def select(self, rows: Tensor) -> None:
        """Keep these rows of the batch, in this order, repeats allowed."""
        self.buffers = [buffer[rows] for buffer in self.buffers]


def growing_cache(layers: int) -> DynamicCache:
    cache = DynamicCache()
    cache.layers = [GrowingLayer() for _ in range(layers)]
    return cache


class TorchEngine:
    """Samples from its own copy of the weights, `batch` sequences at a time. A response ends where
    prompt and response together reach `max_tokens`."""

    name = "torch"

    def __init__(
        self,
        path: str,
        tokenizer,
        *,
        dtype: torch.dtype,
        device: torch.device,
        batch: int,
        max_tokens: int,
    ):
        self.lm = (
            AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="sdpa")
            .to(device)
            .eval()
        )
        self.tokenizer, self.device, self.batch, self.max_tokens = (
            tokenizer,
            device,
            batch,
            max_tokens,
        )

    def sync(self, named_weights: Iterable[tuple[str, Tensor]]) -> None:
        """Take over the trainer's weights: every one of them, by name."""
        own = self.lm.state_dict()
        with torch.no_grad():
            seen = {name for name, tensor in named_weights if own[name].copy_(tensor) is not None}
        if missing := own.keys() - seen:
            raise RuntimeError(f"weight sync left out {sorted(missing)}")

    def sleep(self) -> None:
        """Give memory back before training; nothing to give back here."""

    def close(self) -> None:
        """Release the engine at the end of the program."""

    def generate(
        self, requests: list[Request], sampling: Sampling, on_finish: OnFinish = no_callback
    ) -> list[Completion]:
        """One completion per request, in order; `on_finish(i, completion)` is called as request i
        finishes, or soon after. Longest prompts first, so that a batch pads little and runs out of
        memory, if ever, at once."""
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i].prompt_ids))
        completions: dict[int, Completion] = {}
        for start in range(0, len(order), self.batch):
            chosen = order[start : start + self.batch]
            for k, completion in self._generate([requests[i] for i in chosen], sampling):
                completions[chosen[k]] = completion
                on_finish(chosen[k], completion)
        return [completions[i] for i in range(len(requests))]

    @torch.inference_mode()
    def _generate(
        self, requests: list[Request], sampling: Sampling
    ) -> Iterator[tuple[int, Completion]]:
        room = [min(sampling.max_new_tokens, self.max_tokens - len(r.prompt_ids)) for r in requests]
        count, limit = len(requests), max(room)
        uniform_BL = torch.from_numpy(uniforms([r.seed for r in requests], limit)).to(self.device)
        token_BL = torch.zeros(count, limit, dtype=torch.long, device=self.device)
        logprob_BL = torch.zeros(count, limit, device=self.device)
        length_B = torch.tensor(room, device=self.device)  # until a stop rule makes it shorter
        finished_B = torch.zeros(count, dtype=torch.bool, device=self.device)
        stop_ids = torch.tensor(sampling.stop_token_ids, dtype=torch.long, device=self.device)

        logits_BV, cache, real_BL, position_B = self._prefill(
            [r.prompt_ids for r in requests], limit
        )
        row_B = torch.arange(count, device=self.device)  # which request each live row belongs to
        for t in range(limit):
            token_B, token_logprob_B = draw(logits_BV, uniform_BL[row_B, t], sampling.temperature)
            token_BL[row_B, t], logprob_BL[row_B, t] = token_B, token_logprob_B
            stopped_B = torch.isin(token_B, stop_ids) | self._ends_with_stop_string(
                token_BL[row_B, : t + 1], sampling.stop
            )
            stopped_B &= t < length_B[row_B]  # not the rows that ended before
            length_B[row_B[stopped_B]], finished_B[row_B[stopped_B]] = t + 1, True

            live_B = t + 1 < length_B[row_B]
            alive = int(live_B.sum())
            if alive < 0.7 * len(row_B):  # rows that ended ride along until it pays to drop them
                ended = row_B[~live_B]
                columns = (
                    ended,
                    token_BL[ended],
                    logprob_BL[ended],
                    length_B[ended],
                    finished_B[ended],
                )
                for row, tokens, logprobs, n, finished in zip(
                    *(c.tolist() for c in columns), strict=True
                ):
                    yield row, Completion(tokens[:n], logprobs[:n], finished)
                if alive == 0:
                    return
                keep = live_B.nonzero()[:, 0]
                row_B, token_B, position_B = row_B[keep], token_B[keep], position_B[keep]
                real_BL = None if real_BL is None else real_BL[keep]
                for layer in cache.layers:
                    layer.select(keep)
            logits_BV = self._forward(token_B[:, None], position_B[:, None], real_BL, cache)
            position_B = position_B + 1

    def _prefill(self, prompts: list[list[int]], room: int):
        """Logits after each prompt, [B, V], the cache, and where the padding is: bool [B, L + room]
        or None without any. Prompts are padded on the left; samples of one prompt share its
        pass."""
        distinct = list(dict.fromkeys(map(tuple, prompts)))
        longest = max(map(len, distinct))
        length_U = torch.tensor([len(p) for p in distinct], device=self.device)
        token_UL = torch.tensor(
            [[0] * (longest - len(p)) + list(p) for p in distinct], device=self.device
        )
        slot_L = torch.arange(longest + room, device=self.device)
        real_UL = slot_L[None] >= (longest - length_U)[:, None]
        position_UL = (slot_L[None, :longest] - (longest - length_U)[:, None]).clamp(min=0)
        padded = bool((length_U < longest).any())

        cache = growing_cache(self.lm.config.num_hidden_layers)
        logits_UV = self._forward(token_UL, position_UL, real_UL if padded else None, cache)
        index = {p: i for i, p in enumerate(distinct)}
        row_B = torch.tensor([index[tuple(p)] for p in prompts], device=self.device)
        for layer in cache.layers:
            layer.select(row_B)
        return logits_UV[row_B], cache, real_UL[row_B] if padded else None, length_U[row_B]

    def _forward(
        self, token_BL: Tensor, position_BL: Tensor, real_BL: Tensor | None, cache: DynamicCache
    ) -> Tensor:
        """Logits of the last position, [B, V]; adds the tokens to the cache."""
        new, mask = token_BL.shape[1], None
        if (
            real_BL is not None
        ):  # ours, [B, 1, new, past + new]: transformers would build one anew for every layer type
            slot_L = torch.arange(cache.get_seq_length() + new, device=self.device)
            mask = (real_BL[:, None, None, : len(slot_L)]) & (slot_L <= slot_L[-new:, None])
            mask |= (
                slot_L == slot_L[-new:, None]
            )  # a padded query sees itself, so that no row is empty
        out = self.lm(
            input_ids=token_BL,
            position_ids=position_BL,
            attention_mask=mask,
            past_key_values=cache,
            logits_to_keep=1,
        )
        return out.logits[:, -1]

    def _ends_with_stop_string(self, token_BL: Tensor, stop: tuple[str, ...]) -> Tensor:
        """[B] bool: does the text of these tokens end in a stop string, or in one with a few
        characters after it?"""
        if not stop:
            return torch.zeros(len(token_BL), dtype=torch.bool, device=self.device)
        tail = max(map(len, stop)) + 4  # a token is at least one byte of text
        texts = self.tokenizer.batch_decode(token_BL[:, -tail:])
        return torch.tensor([any(s in text for s in stop) for text in texts], device=self.device)
