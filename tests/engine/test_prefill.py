"""Prompts are prefilled in chunks of their own: the same plans beside any others."""

import pytest
import torch

from engine.engine import Engine
from models.glm_image.model import GlmImage
from models.glm_image.paged_attention import PagedKV, PrefillAttention, PromptChunk, SequenceKV
from models.glm_image.planner import PlannerBatch, RotaryTable
from tests.checkpoints import small_engine
from tests.engine.test_lookahead import mixed_work, plans_of

WORK = mixed_work(7, seed=3)


def chunked(model: GlmImage, tokens: int) -> Engine:
    engine = small_engine(model)
    engine.planner.scheduler.chunk_tokens = tokens
    return engine


@pytest.mark.parametrize("scattered", [False, True])
@torch.inference_mode()
def test_chunks_give_the_hidden_states_of_the_whole_prompt(model: GlmImage, scattered: bool) -> None:
    config, length = model.planner.config, 150
    tokens = torch.randint(config.vocab_size, (length,), generator=torch.Generator().manual_seed(1))
    rotary = RotaryTable(config, length, model.device).at(torch.arange(length)[:, None].expand(-1, 3), model.dtype)
    states: list[torch.Tensor] = []
    for size in (length, 64, 7):
        kv = PagedKV(config, 10, 32, model.dtype, model.device)
        blocks = [7, 2, 9, 4, 1] if scattered else [2, 3, 4, 5, 6]
        parts: list[torch.Tensor] = []
        for start in range(0, length, size):
            part = slice(start, min(length, start + size))
            slots = torch.tensor([blocks[t // 32] * 32 + t % 32 for t in range(part.start, part.stop)])
            attention = PrefillAttention(kv, [PromptChunk(SequenceKV(kv, blocks), part.start, part.stop)], slots)
            parts.append(model.planner(tokens[part], PlannerBatch((rotary[0][part], rotary[1][part]), attention)))
        states.append(torch.cat(parts))
    for state in states[1:]:
        torch.testing.assert_close(state, states[0], rtol=1e-4, atol=1e-4)


def test_plans_in_chunks_do_not_depend_on_other_requests(model: GlmImage) -> None:
    alone: dict[tuple[str, int], list[int]] = {}
    engine = chunked(model, 16)
    for number, work in enumerate(WORK):
        alone |= plans_of(engine, [work], first=number)
    assert plans_of(chunked(model, 16), WORK) == alone
    whole = plans_of(small_engine(model), WORK)
    same = [alone[key] == tokens for key, tokens in whole.items()]
    assert sum(same) >= 0.7 * len(same), "sums round differently: a plan may change at a tie"
