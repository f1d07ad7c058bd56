import pickle
import sys
from pathlib import Path

import numpy as np
import pytest

from difftune.data.mapped import map_array, part


@pytest.fixture
def file(tmp_path) -> Path:
    np.arange(9000, dtype=np.int32).tofile(tmp_path / "numbers.bin")
    return tmp_path / "numbers.bin"


def test_another_size_is_an_error_and_nothing_is_an_array(file, tmp_path):
    with pytest.raises(ValueError, match=r"numbers.bin has 36000 bytes instead of 8999 entries"):
        map_array(file, np.int32, 8999)
    (tmp_path / "empty.bin").touch()
    nothing = map_array(tmp_path / "empty.bin", np.int32, 0, scattered=True)
    assert nothing.shape == (0,) and nothing.dtype == np.int32 and len(part(nothing, 0, 0)) == 0


@pytest.mark.parametrize("scattered", [True, False])
def test_parts_are_those_of_the_array(file, scattered):
    plain, array = np.arange(9000, dtype=np.int32), map_array(file, np.int32, 9000, scattered=scattered)
    for start, end in [(0, 0), (0, 1), (1023, 1025), (5000, 9000), (8999, 9000), (9000, 9000)]:
        assert np.array_equal(part(array, start, end), plain[start:end])
        assert np.array_equal(part(plain, start, end), plain[start:end])
    for start, end in [(0, 1), (700, 2999), (3000, 3000)]:
        assert np.array_equal(part(array.reshape(3000, 3), start, end), plain.reshape(3000, 3)[start:end])


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel says only on Linux how a file is mapped")
@pytest.mark.parametrize("scattered", [True, False])
def test_the_system_reads_ahead_unless_parts_are_read_here_and_there(file, scattered):
    array = map_array(file, np.int32, 9000, scattered=scattered)
    mapping = Path("/proc/self/smaps").read_text().split(str(file))[1]
    flags = next(line for line in mapping.splitlines() if line.startswith("VmFlags")).split()[1:]
    assert ("rr" in flags) is scattered and array[8999] == 8999


def test_arrays_go_to_another_process_by_name(file):
    array = map_array(file, np.int32, 9000, scattered=True)
    for whole in (array, array.reshape(3000, 3)):
        for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
            pickled = pickle.dumps(whole, protocol)
            again = pickle.loads(pickled)
            assert len(pickled) < 1000 and isinstance(again, np.memmap) and again.scattered
            assert np.array_equal(again, whole)


def test_what_is_not_the_whole_file_goes_as_any_array(file):
    array = map_array(file, np.int32, 9000)
    for other in (array[3:50], array[:9000:2], array + 1, np.diff(array), array[:0], array.sum(), np.array(array)):
        again = pickle.loads(pickle.dumps(other))
        assert np.array_equal(again, other) and not isinstance(again, np.memmap)
