"""The keystream: RFC 8439's vectors, the counters' edges, and the same words on every backend."""

import pytest
import torch

from ffa_kernels import ops
from ffa_kernels.backends.dispatch import use_backend
from ffa_kernels.errors import ConfigError

COUNTING_KEY = bytes(range(32))
ZERO_KEY = bytes(32)
# Key, nonce, block counter, keystream block.
RFC_8439_BLOCKS = {
    "2.3.2": (
        COUNTING_KEY,
        "000000090000004a00000000",
        1,
        "10f1e7e4d13b5915500fdd1fa32071c4c7d1f4c733c068030422aa9ac3d46c4e"
        "d2826446079faa0914c2d705d98b02a2b5129cd1de164eb9cbd083e8a2503c4e",
    ),
    "A.1 #1": (
        ZERO_KEY,
        "000000000000000000000000",
        0,
        "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
        "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586",
    ),
    "A.1 #2": (
        ZERO_KEY,
        "000000000000000000000000",
        1,
        "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"
        "29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f",
    ),
    "A.1 #3": (
        bytes(31) + b"\x01",
        "000000000000000000000000",
        1,
        "3aeb5224ecf849929b9d828db1ced4dd832025e8018b8160b82284f3c949aa5a"
        "8eca00bbb4a73bdad192b5c42f73f2fd4e273644c8b36125a64addeb006c13a0",
    ),
    "A.1 #4": (
        b"\x00\xff" + bytes(30),
        "000000000000000000000000",
        2,
        "72d54dfbf12ec44b362692df94137f328fea8da73990265ec1bbbea1ae9af0ca"
        "13b25aa26cb4a648cb9b9d1be65b2c0924a66c54d545ec1b7374f4872e99f096",
    ),
    "A.1 #5": (
        ZERO_KEY,
        "000000000000000000000002",
        0,
        "c2c64d378cd536374ae204b9ef933fcd1a8b2288b3dfa49672ab765b54ee27c7"
        "8a970e0e955c14f3a88e741b97c286f75f8fc299e8148362fa198a39531bed6d",
    ),
    # Beyond the RFC, from OpenSSL 3.0: every counter word at its end.
    "last block": (
        COUNTING_KEY,
        "ffffffff00000000ffffffff",
        0xFFFFFFFF,
        "d8ebc0befeba53d13c839f5b6f4ecec0a44210d33b506720b6b21a825db5b9af"
        "213712252fe6464b6f1036387ad69d2ce18da63edfc2baefa3fdba46a35b16c7",
    ),
}
SUNSCREEN = (
    b"Ladies and Gentlemen of the class of '99: If I could offer you only one tip for the "
    b"future, sunscreen would be it."
)
SUNSCREEN_ENCRYPTED = bytes.fromhex(
    "6e2e359a2568f98041ba0728dd0d6981e97e7aec1d4360c20a27afccfd9fae0bf91b65c5524733ab8f593dabcd62"
    "b3571639d624e65152ab8f530c359f0861d807ca0dbf500d6a6156a38e088a22b65e52bc514d16ccf806818ce91a"
    "b77937365af90bbf74a35be6b40b8eedf2785e42874d"
)


def state_of(key: bytes, step: int) -> torch.Tensor:
    words = [int.from_bytes(key[i : i + 8], "little", signed=True) for i in range(0, 32, 8)]
    return torch.tensor([*words, step], dtype=torch.int64)


def keystream(key: bytes, nonce: str, counter: int, blocks: int) -> bytes:
    raw = bytes.fromhex(nonce)
    step = int.from_bytes(raw[:8], "little", signed=True)
    words = ops.chacha20(state_of(key, step), int.from_bytes(raw[8:], "little"), counter, blocks)
    return words.cpu().numpy().astype("<i4").tobytes()


@pytest.mark.parametrize("name", RFC_8439_BLOCKS)
def test_block_vectors(backend, name):
    key, nonce, counter, expected = RFC_8439_BLOCKS[name]
    assert keystream(key, nonce, counter, 1).hex() == expected


def test_encryption_vector_of_section_2_4_2(backend):
    stream = keystream(COUNTING_KEY, "000000000000004a00000000", 1, 2)
    encrypted = bytes(a ^ b for a, b in zip(SUNSCREEN, stream, strict=False))
    assert encrypted == SUNSCREEN_ENCRYPTED


@pytest.mark.parametrize("first", [0, 1, 2**31 - 3, 2**32 - 37])
def test_a_run_of_blocks_is_the_blocks_one_by_one(backend, first):
    state = state_of(COUNTING_KEY, 5)
    run = ops.chacha20(state, 3, first, 37)
    singles = [ops.chacha20(state, 3, first + i, 1) for i in range(37)]
    assert run.dtype == torch.int32
    assert torch.equal(run, torch.cat(singles))


def test_both_words_of_the_step_and_the_tensor_id_choose_the_stream(backend):
    steps = [0, 1, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**63 - 1, -1]
    streams = [ops.chacha20(state_of(ZERO_KEY, step), 0, 0, 1) for step in steps]
    streams += [ops.chacha20(state_of(ZERO_KEY, 0), i, 0, 1) for i in (1, 2**31, 2**32 - 1)]
    assert len({tuple(s.flatten().tolist()) for s in streams}) == len(streams)


def test_step_words_are_the_first_two_nonce_words(backend):
    key, nonce, counter, expected = RFC_8439_BLOCKS["2.3.2"]
    step = 0x4A000000_09000000
    words = ops.chacha20(state_of(key, step), 0, counter, 1)
    assert bytes.fromhex(nonce)[:8] == step.to_bytes(8, "little")
    assert words.cpu().numpy().astype("<i4").tobytes().hex() == expected


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("blocks", [0, 1, 7, 8, 16, 17, 1024, 3001])
def test_backends_give_the_same_words(blocks, threads):
    torch.set_num_threads(threads)
    state = torch.tensor([2**63 - 1, -(2**63), -1, 0x0123456789ABCDEF, 2**33 + 7])
    with use_backend("reference"):
        expected = ops.chacha20(state, 2**32 - 1, 2**32 - 4000, blocks)
    with use_backend("cpu"):
        words = ops.chacha20(state, 2**32 - 1, 2**32 - 4000, blocks)
        strided = torch.stack([state, state], dim=1)[:, 1]
        assert torch.equal(ops.chacha20(strided, 2**32 - 1, 2**32 - 4000, blocks), expected)
    assert words.shape == (blocks, 16)
    assert torch.equal(words, expected)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("blocks", [0, 1, 4097])
@pytest.mark.parametrize("tensor_id", [0, 1, 2**31, 2**32 - 1])
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_triton_gives_the_words_of_the_cpu(tensor_id, blocks):
    pytest.importorskip("triton")
    state = torch.tensor([2**63 - 1, -(2**63), -1, 0x0123456789ABCDEF, 2**33 + 7])
    with use_backend("cpu"):
        expected = ops.chacha20(state, tensor_id, 2**31 - 2000, blocks)
    here = "cuda" if torch.cuda.is_available() else "cpu"
    with use_backend("triton"):
        words = ops.chacha20(state.to(here), tensor_id, 2**31 - 2000, blocks)
    assert torch.equal(words.cpu(), expected)


def test_state_is_read_only(backend):
    state = state_of(COUNTING_KEY, 9)
    ops.chacha20(state, 0, 0, 3)
    assert torch.equal(state, state_of(COUNTING_KEY, 9))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rng_state": torch.zeros(4, dtype=torch.int64)}, r"rng_state is torch.int64 \(4,\)"),
        ({"rng_state": torch.zeros(5)}, r"rng_state is torch.float32 \(5,\)"),
        ({"tensor_id": -1}, "tensor_id is -1; accepted: 0 to"),
        ({"tensor_id": 2**32}, "tensor_id is 4294967296; accepted"),
        ({"first_block": -1}, "blocks -1 to 0; accepted"),
        ({"n_blocks": -1}, "blocks 0 to -1; accepted"),
        ({"first_block": 2**32 - 1, "n_blocks": 2}, "where the counter would repeat"),
    ],
)
def test_errors_name_the_argument(change, message):
    arguments = {"rng_state": state_of(ZERO_KEY, 0), "tensor_id": 0, "first_block": 0}
    with pytest.raises(ConfigError, match=message):
        ops.chacha20(**{**arguments, "n_blocks": 1, **change})


def test_opcheck(backend):
    torch.library.opcheck(torch.ops.ffa.chacha20.default, (state_of(COUNTING_KEY, 1), 2, 3, 4))
