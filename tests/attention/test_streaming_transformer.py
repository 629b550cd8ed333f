"""Streaming transformer and video: chunks against single layers, state, errors."""

import copy

import pytest
import torch
from torch import nn

from adms.attention.adaptive_update import AdaptiveUpdateAttention
from adms.attention.streaming_transformer import StreamingTransformer, process_video_sequence
from adms.errors import ADMSTypeError, ADMSValueError


def make_model(**arguments) -> StreamingTransformer:
    torch.manual_seed(0)
    return StreamingTransformer(16, 4, 2, **arguments).double().eval()


def reuse(model: nn.Module) -> None:
    """Make every gate of the model keep what is cached."""
    for module in model.modules():
        if isinstance(module, AdaptiveUpdateAttention):
            module.update_threshold = 1.0


def frames(count: int, batch: int = 2, tokens: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, batch, tokens, 16, generator=generator, dtype=torch.float64)


def test_a_chunk_is_pre_norm_blocks_over_the_layers_and_their_caches():
    model = make_model()
    model.adaptive_layers[1].update_threshold = 1.0
    stream = frames(3)
    keys = values = [None, None]
    for chunk in stream:
        x, next_keys, next_values = chunk, [], []
        for i, layer in enumerate(model.adaptive_layers):
            attended, caches = layer(
                model.attention_norms[i](x), key_cache=keys[i], value_cache=values[i]
            )
            x = x + attended
            x = x + model.mlps[i](model.mlp_norms[i](x))
            next_keys.append(caches["key_cache"])
            next_values.append(caches["value_cache"])
        keys, values = next_keys, next_values
        torch.testing.assert_close(model.process_stream_chunk(chunk), x)
        assert torch.equal(model.key_caches[1], keys[1])
    assert model.key_updated.tolist() == [[True, True], [False, False]]
    assert model.value_updated.tolist() == [[True, True], [False, False]]


def test_reuse_changes_the_output_and_reset_forgets():
    model = make_model()
    reuse(model)
    first, second = frames(2)
    expected = model.process_stream_chunk(second)
    model.reset()
    assert model.key_caches == [None, None] and model.key_updated is None
    model(first)
    assert not torch.allclose(model(second), expected)
    model.reset()
    assert torch.equal(model(second), expected)


def test_memory_is_one_chunk_however_long_the_stream():
    model = make_model()
    sizes = set()
    for chunk in frames(30):
        with torch.no_grad():
            model(chunk)
        sizes.add(sum(c.untyped_storage().nbytes() for c in model.key_caches + model.value_caches))
    assert sizes == {2 * 2 * 2 * 5 * 16 * 8}


def test_chunks_of_changing_length_and_a_mask():
    model = make_model()
    reuse(model)
    model(frames(1)[0])
    shorter = frames(1, tokens=3)[0]
    mask = torch.ones(3, 3, dtype=torch.bool).tril()
    output = model(shorter, mask=mask)
    assert model.key_updated.all()
    fresh = make_model(is_causal=True)
    torch.testing.assert_close(output, fresh(shorter))


def test_an_embedding_maps_what_comes_in():
    embedding = nn.Embedding(11, 16).double()
    model = make_model(embedding=embedding)
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    assert torch.equal(model(ids), make_model()(embedding(ids)))
    assert "embedding.weight" in model.state_dict()


def test_gradients_end_at_the_chunk_and_reach_every_gate():
    model = make_model().train()
    for chunk in frames(3):
        output = model(chunk)
        loss = output.square().mean() + (model.update_cost if model.update_cost else 0.0)
        model.zero_grad()
        loss.backward()
    for layer in model.adaptive_layers:
        for predictor in (layer.key_update_predictor, layer.value_update_predictor):
            assert predictor[2].bias.grad.abs() > 0
    copy.deepcopy(model)


def test_gradients_cross_chunks_when_asked():
    model = make_model(detach_caches=False).train()
    reuse(model)
    first, second = frames(2)
    first.requires_grad_()
    model(first)
    model(second).sum().backward()
    assert first.grad.abs().sum() > 0


def test_a_failed_chunk_leaves_the_stream_as_it_was():
    model = make_model()
    reuse(model)
    first, second = frames(2)
    model(first)
    expected = copy.deepcopy(model)(second)
    hook = model.mlps[1].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(frames(3)[2])
    hook.remove()
    assert torch.equal(model(second), expected)


def test_video_through_a_layer_equals_the_loop_by_hand():
    torch.manual_seed(0)
    layer = AdaptiveUpdateAttention(16, 4).double().eval()
    with torch.no_grad():
        predictor = layer.key_update_predictor
        predictor[0].weight.zero_()
        predictor[0].weight[0, 0] = 1.0
        predictor[2].weight[0, 0], predictor[2].bias[0] = 4.0, -2.0
        predictor[0].bias.zero_()
        predictor[2].weight[0, 1:] = 0.0
    video = frames(6)
    video[..., 0] = torch.tensor([[0, 0], [0, 1], [0, 0], [1, 1], [0, 0], [1, 0]])[:, :, None]
    outputs, updates = process_video_sequence(video, layer)
    assert updates.int().tolist() == [[1, 1], [0, 1], [0, 0], [1, 1], [0, 0], [1, 0]]
    keys = values = None
    for frame, output in zip(video, outputs, strict=True):
        expected, caches = layer(frame, key_cache=keys, value_cache=values)
        keys, values = caches["key_cache"], caches["value_cache"]
        assert torch.equal(output, expected)


def test_video_through_a_model_starts_afresh_and_takes_generators():
    model = make_model()
    reuse(model)
    video = frames(4)
    first, updates = process_video_sequence(video, model)
    second, _ = process_video_sequence((frame for frame in video), model)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert updates.tolist() == [[True, True]] + [[False, False]] * 3
    model.adaptive_layers[1].update_threshold = 0.0
    assert process_video_sequence(video, model)[1].all()


def test_errors_say_what_to_do():
    with pytest.raises(ADMSValueError, match="num_layers must be at least 1"):
        StreamingTransformer(16, 4, 0)
    with pytest.raises(ADMSValueError, match="multiple of heads"):
        StreamingTransformer(16, 3, 1)
    with pytest.raises(ADMSTypeError, match="embedding must be a torch module"):
        StreamingTransformer(16, 4, 1, embedding=lambda x: x)
    model = make_model()
    with pytest.raises(ADMSTypeError, match="embed token ids"):
        model(torch.ones(2, 5, dtype=torch.long))
    model(frames(1)[0])
    with pytest.raises(ADMSValueError, match="pass None to start another stream"):
        model(frames(1, batch=3)[0])
    with pytest.raises(ADMSValueError, match="at least one frame"):
        process_video_sequence([], model)
    with pytest.raises(ADMSTypeError, match="got Linear"):
        process_video_sequence(frames(1), nn.Linear(16, 16))
