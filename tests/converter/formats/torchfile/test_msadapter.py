"""Archives of MSAdapter are told from torch's by what their pickles name."""

from __future__ import annotations

import pytest

from ckpt2pt.formats.torchfile.msadapter import is_msadapter


@pytest.mark.parametrize(
    ("pickle", "foreign"),
    [
        (b"\x80\x02cmindspore.common.tensor\nTensor\n.", True),
        (b"\x80\x02cmindspore._c_expression.typing\nBFloat\n.", True),
        (b"\x80\x02cmsadapter._utils\n_rebuild_tensor_v2\n.", True),
        (b"\x80\x02cmindtorch.torch._tensor\n_rebuild_from_type_v2\n.", True),
        (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n.", False),
        (b"\x80\x02X\x20\x00\x00\x00cmsadapterfest\nnothing of it at all.", False),
        (b"", False),
    ],
)
def test_msadapter_is_told_by_the_names_of_its_pickle(pickle: bytes, foreign: bool) -> None:
    assert is_msadapter(pickle) is foreign
