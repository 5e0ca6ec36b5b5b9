"""A batched KV-cache sampler in plain PyTorch, for machines without a GPU."""

from collections.abc import Callable, Iterable, Iterator
from operator import sub
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    DynamicCache,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.cache_utils import DynamicLayer

from drgrpo.types import Completion, OnFinish, Request, Sampling, never, no_callback


def uniforms(seed_B: list[int], count: int) -> np.ndarray:
    """[B, count] numbers in [0, 1), each a function of its row's seed and its column alone.

    SplitMix64 (Steele 2014), with the product of seed and `mix_2` as its initial state."""
    constants = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
    golden, mix_1, mix_2 = map(np.uint64, constants)
    seed_B1 = np.array(seed_B, dtype=np.uint64)[:, None]
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64
        z = seed_B1 * mix_2 + np.arange(1, count + 1, dtype=np.uint64) * golden
        z = (z ^ (z >> np.uint64(30))) * mix_1
        z = (z ^ (z >> np.uint64(27))) * mix_2
        z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(11)) * 2.0**-53


def sample_token(logits_BV: Tensor, uniform_B: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """A token and its log-probability for each row, [B] each, by inverting the cumulative
    distribution. At temperature 0: the likeliest token."""
    logprob_BV = torch.log_softmax(logits_BV.float() / (temperature or 1.0), dim=-1)
    if temperature == 0:
        token_B = logprob_BV.argmax(-1)
    else:
        cdf_BV = logprob_BV.exp().cumsum(-1, dtype=torch.double)
        # The sum of the rounded probabilities is not exactly 1.
        threshold_B = uniform_B * cdf_BV[:, -1]
        token_B = torch.searchsorted(cdf_BV, threshold_B[:, None], right=True)[:, 0]
        token_B = token_B.clamp(max=logits_BV.shape[1] - 1)
    return token_B, logprob_BV.gather(1, token_B[:, None])[:, 0]


def grouped_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Causal attention to a cache, where H query heads share K key heads.

    query [B, H, new, d], key and value [B, K, length, d] -> [B, new, H, d]. Without a `mask`,
    [B, 1, new, length], all tokens are new or one is. A single new token brings H / K queries to
    each key head. They are rows of one matrix, which a CPU multiplies several times as fast."""
    (B, H, new, d), K, scale = query.shape, key.shape[1], options.get("scaling")
    if new == 1:
        query = query.reshape(B, K, H // K, d)
        out = F.scaled_dot_product_attention(query, key, value, mask, scale=scale)
        return out.reshape(B, 1, H, d), None
    out = F.scaled_dot_product_attention(
        query, key, value, mask, is_causal=mask is None, scale=scale, enable_gqa=H != K
    )
    return out.transpose(1, 2), None


def float32_head(lm: PreTrainedModel) -> None:
    """Compute logits in float32, as the trainer does. 16 bits round a logit of 20 by up to 0.06.

    The head gets a weight of its own, because a tied one is the embedding too."""
    head = lm.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.float(), requires_grad=False)
    head.register_forward_pre_hook(lambda module, args: (args[0].float(),))


class GrowingLayer(DynamicLayer):
    """A layer of the KV cache whose buffers double when they are full.

    transformers' own layer copies all keys and values for every token."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values, [B, K, new, d] each. Returns all of them, [B, K, length, d]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.length, self.buffers = 0, [key_states[:, :, :0], value_states[:, :, :0]]
        end = self.length + key_states.shape[2]
        if end > self.buffers[0].shape[2]:
            self.buffers = [self._grown(buffer, max(2 * end, 32)) for buffer in self.buffers]
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, self.length : end] = states
        self.length = end
        self.keys, self.values = (buffer[:, :, :end] for buffer in self.buffers)
        return self.keys, self.values

    def _grown(self, buffer: Tensor, capacity: int) -> Tensor:
        grown = buffer.new_empty(*buffer.shape[:2], capacity, buffer.shape[3])
        grown[:, :, : self.length] = buffer[:, :, : self.length]
        return grown

    def get_seq_length(self) -> int:
        """Tokens in the cache."""
        return self.length if self.is_initialized else 0

    def select(self, rows: Tensor) -> None:
        """Keep these rows of the batch, in this order. A row may be repeated."""
        self.buffers = [buffer[rows] for buffer in self.buffers]


class TorchEngine:
    """Samples from its own copy of the weights, `batch` sequences at a time.

    A response ends where prompt and response together reach `max_tokens`."""

    name = "torch"

    def __init__(
        self,
        path: str,
        tokenizer: PreTrainedTokenizerBase,
        *,
        dtype: torch.dtype,
        device: torch.device,
        batch: int,
        max_tokens: int,
    ) -> None:
        AttentionInterface.register("drgrpo_grouped", grouped_attention)
        lm = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, attn_implementation="drgrpo_grouped"
        )
        if dtype != torch.float32:
            float32_head(lm)
        self.lm, self.tokenizer, self.device = lm.to(device).eval(), tokenizer, device
        self.batch, self.max_tokens = batch, max_tokens

    def sync(self, named_weights: Iterable[tuple[str, Tensor]]) -> None:
        """Copy the trainer's weights. RuntimeError if one is missing."""
        own = self.lm.state_dict()
        missing = set(own)
        with torch.no_grad():
            for name, tensor in named_weights:
                own[name].copy_(tensor)
                missing.discard(name)
        if missing:
            raise RuntimeError(f"weight sync left out {sorted(missing)}")

    def sleep(self) -> None:
        """Nothing to free."""

    def close(self) -> None:
        """Nothing to release."""

    def generate(
        self,
        requests: list[Request],
        sampling: Sampling,
        on_finish: OnFinish = no_callback,
        enough: Callable[[], bool] = never,
    ) -> list[Completion]:
        """One completion per request, in order. It begins with what the request has already drawn.

        `on_finish(i, completion)` is called as request i finishes. `enough()` is asked after every
        token. With unchanged weights, an open completion goes on with the same tokens as if it had
        never stopped."""
        # Longest texts first: a batch pads little, and runs out of memory at once if ever.
        order = sorted(range(len(requests)), key=lambda i: -len(text_ids(requests[i])))
        completions = [request.drawn for request in requests]
        for start in range(0, len(order), self.batch):
            if enough():
                break
            chosen = order[start : start + self.batch]
            batch = [requests[i] for i in chosen]
            for row, completion in self._generate(batch, sampling, enough):
                completions[chosen[row]] = completion
                if not completion.open:
                    on_finish(chosen[row], completion)
        return completions

    @torch.inference_mode()
    def _generate(
        self, requests: list[Request], sampling: Sampling, enough: Callable[[], bool]
    ) -> Iterator[tuple[int, Completion]]:
        """(row, completion) of one batch: those that end, and then the open ones."""
        room = [min(sampling.max_new_tokens, self.max_tokens - len(r.prompt_ids)) for r in requests]
        drawn = [len(r.drawn.token_ids) for r in requests]
        count, limit, most = len(requests), max(room), max(map(sub, room, drawn))
        uniform_BL = torch.from_numpy(uniforms([r.seed for r in requests], limit)).to(self.device)
        token_BL = torch.zeros(count, limit, dtype=torch.long, device=self.device)
        logprob_BL = torch.zeros(count, limit, device=self.device)
        for row in filter(drawn.__getitem__, range(count)):
            token_BL[row, : drawn[row]] = torch.tensor(requests[row].drawn.token_ids)
            logprob_BL[row, : drawn[row]] = torch.tensor(requests[row].drawn.logprobs)
        length_B = torch.tensor(room, device=self.device)  # until a stop rule makes it shorter
        finished_B = torch.zeros(count, dtype=torch.bool, device=self.device)
        stop_ids = torch.tensor(sampling.stop_token_ids, dtype=torch.long, device=self.device)

        def completed(rows: Tensor, end_R: Tensor, open: bool) -> Iterator[tuple[int, Completion]]:
            for row, n in zip(rows.tolist(), end_R.tolist(), strict=True):
                tokens, logprobs = token_BL[row, :n].tolist(), logprob_BL[row, :n].tolist()
                yield row, Completion(tokens, logprobs, bool(finished_B[row]), open)

        texts = list(map(text_ids, requests))
        logits_BV, cache, real_BL, position_B = self._prefill(texts, most)
        row_B = torch.arange(count, device=self.device)  # which request each live row belongs to
        end_B = torch.tensor(drawn, device=self.device)  # tokens of its response so far
        for _ in range(most):
            slot_B = end_B.clamp(max=limit - 1)  # rows that ended draw on, and nobody reads it
            token_B, token_logprob_B = sample_token(
                logits_BV, uniform_BL[row_B, slot_B], sampling.temperature
            )
            token_BL[row_B, slot_B], logprob_BL[row_B, slot_B] = token_B, token_logprob_B
            end_B = end_B + 1
            stopped_B = torch.isin(token_B, stop_ids)
            stopped_B |= self._ends_with_stop_string(token_BL, row_B, end_B, sampling.stop)
            stopped_B &= end_B <= length_B[row_B]  # not the rows that ended before
            length_B[row_B[stopped_B]], finished_B[row_B[stopped_B]] = end_B[stopped_B], True

            ended_B, live_B = end_B == length_B[row_B], end_B < length_B[row_B]
            yield from completed(row_B[ended_B], end_B[ended_B], open=False)
            alive = int(live_B.sum())
            if alive == 0 or enough():
                yield from completed(row_B[live_B], end_B[live_B], open=True)
                return
            # Rows that ended stay in the batch until it pays to drop them.
            if alive < 0.7 * len(row_B):
                keep = live_B.nonzero()[:, 0]
                row_B, end_B, token_B = row_B[keep], end_B[keep], token_B[keep]
                position_B = position_B[keep]
                real_BL = None if real_BL is None else real_BL[keep]
                for layer in cache.layers:
                    layer.select(keep)
            logits_BV = self._forward(token_B[:, None], position_B[:, None], real_BL, cache)
            position_B = position_B + 1

    def _prefill(
        self, prompts: list[list[int]], room: int
    ) -> tuple[Tensor, DynamicCache, Tensor | None, Tensor]:
        """Logits after each prompt [B, V], the cache, where tokens are real and not padding
        (bool [B, L + room], None without padding), and the next position [B].

        Prompts are padded on the left. Samples of one prompt (U distinct ones) share its pass."""
        distinct = list(dict.fromkeys(map(tuple, prompts)))
        longest = max(map(len, distinct))
        padded = [[0] * (longest - len(p)) + list(p) for p in distinct]
        token_UL = torch.tensor(padded, device=self.device)
        length_U = torch.tensor(list(map(len, distinct)), device=self.device)
        slot_L = torch.arange(longest + room, device=self.device)
        padding_U1 = (longest - length_U)[:, None]
        real_UL = slot_L[None] >= padding_U1 if bool((length_U < longest).any()) else None
        position_UL = (slot_L[None, :longest] - padding_U1).clamp(min=0)

        cache = DynamicCache()
        cache.layers = [GrowingLayer() for _ in range(self.lm.config.num_hidden_layers)]
        logits_UV = self._forward(token_UL, position_UL, real_UL, cache)
        index = {prompt: i for i, prompt in enumerate(distinct)}
        row_B = torch.tensor([index[tuple(p)] for p in prompts], device=self.device)
        for layer in cache.layers:
            layer.select(row_B)
        return logits_UV[row_B], cache, None if real_UL is None else real_UL[row_B], length_U[row_B]

    def _forward(
        self, token_BL: Tensor, position_BL: Tensor, real_BL: Tensor | None, cache: DynamicCache
    ) -> Tensor:
        """Logits of the last position, [B, V]. The tokens are added to the cache."""
        new, mask = token_BL.shape[1], None
        # A mask [B, 1, new, past + new] of our own: transformers would build one for every layer
        # type, at every token.
        if real_BL is not None:
            slot_L = torch.arange(cache.get_seq_length() + new, device=self.device)
            mask = real_BL[:, None, None, : len(slot_L)] & (slot_L <= slot_L[-new:, None])
            # A padded query attends to itself, so that no row of the softmax is empty.
            mask |= slot_L == slot_L[-new:, None]
        out = self.lm(
            input_ids=token_BL,
            position_ids=position_BL,
            attention_mask=mask,
            past_key_values=cache,
            logits_to_keep=1,
        )
        return out.logits[:, -1]

    def _ends_with_stop_string(
        self, token_BL: Tensor, row_B: Tensor, end_B: Tensor, stop: tuple[str, ...]
    ) -> Tensor:
        """[B] bool: is there a stop string in the last characters of the text of these rows, which
        have `end` tokens?"""
        if not stop:
            return torch.zeros(len(row_B), dtype=torch.bool, device=self.device)
        # A token is at least one byte of text, and a few characters may follow the stop string.
        tail = max(map(len, stop)) + 4
        slot_BL = end_B[:, None] + torch.arange(-tail, 0, device=self.device)
        last_BL = token_BL[row_B[:, None], slot_BL.clamp(0, token_BL.shape[1] - 1)]
        rows = zip(last_BL.tolist(), end_B.tolist(), strict=True)
        texts = self.tokenizer.batch_decode([tokens[-end:] for tokens, end in rows])

        def stopped(text: str) -> bool:
            return any(s in text for s in stop)

        return torch.tensor(list(map(stopped, texts)), device=self.device)


def text_ids(request: Request) -> list[int]:
    """Prompt and response so far."""
    return request.prompt_ids + request.drawn.token_ids
