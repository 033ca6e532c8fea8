"""The product never unpickles, evaluates or runs what a user has sent, and never turns these protections off.

It uses no name in /tmp that another user of the machine could know, and starts no module from the working directory.
"""

from pathlib import Path

from tests.harness.unsafe_calls import unsafe_calls

ROOT = Path(__file__).parents[1]
PACKAGES = ("server", "worker", "zeta", "zeta_core", "migrations")
UNSAFE = """
import pickle
from joblib import load
torch.load(path)
numpy.load(path), np.load(path, mmap_mode="r")
AutoModel.from_pretrained(name, trust_remote_code=allowed)
yaml.load(text)
os.system(command)
eval(text)
Path(tempfile.gettempdir(), "zeta"), tempfile.mktemp()
cache = "/tmp/zeta-cache"
command = [sys.executable, "-m", "zeta_core"]
"""
SAFE = """
torch.load(path, weights_only=True), np.load(path, allow_pickle=False)
AutoModel.from_pretrained(name, trust_remote_code=False)
model.eval(), re.compile(pattern), torch.compile(model), json.load(file), yaml.safe_load(text)
tempfile.mkdtemp(), (sys.executable, "-P", "-m", "zeta_core"), f"free some space in {tempfile.gettempdir()}"
"""


def test_no_package_contains_an_unsafe_call() -> None:
    files = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    assert len(files) > 300
    assert [f"{path.relative_to(ROOT)}:{call}" for path in files for call in unsafe_calls(path)] == []


def test_every_kind_of_unsafe_call_is_found(tmp_path: Path) -> None:
    (tmp_path / "unsafe.py").write_text(UNSAFE)
    assert sorted(unsafe_calls(tmp_path / "unsafe.py"), key=lambda fault: (fault.index(":"), fault)) == [
        "2: import pickle",
        "3: import joblib",
        "4: torch.load without weights_only=True",
        "5: np.load without allow_pickle=False",
        "5: numpy.load without allow_pickle=False",
        "6: AutoModel.from_pretrained with trust_remote_code=allowed",
        "7: yaml.load",
        "8: os.system",
        "9: eval",
        "10: a path in the folder of temporary files",
        "10: tempfile.mktemp",
        "11: the fixed name /tmp/zeta-cache",
        "12: a module imported from the working directory, without -P",
    ]
    (tmp_path / "safe.py").write_text(SAFE)
    assert list(unsafe_calls(tmp_path / "safe.py")) == []
