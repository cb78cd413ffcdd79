"""Without laplace-torch the backend can be imported, and says what it needs when it is made."""

import subprocess
import sys

CODE = """
import sys
sys.modules["laplace"] = sys.modules["laplace.curvature"] = None  # as if it were not installed
from hesscale_lightning import HesScaleGGN
try:
    HesScaleGGN(None, "regression")
except ImportError as error:
    sys.stdout.write(str(error))
"""


def test_the_backend_says_how_to_install_what_it_needs():
    found = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert "pip install 'hesscale_lightning[laplace]'" in found.stdout
