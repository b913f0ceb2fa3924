"""Our numbers against those of public implementations: ``python -m tests.parity DIR [--json]``.

DIR holds .npz files that were computed by RUNNING other projects' code, with the randomness stored. Each array of each
file becomes one row: ok, FAIL, deviates (that project differs from the paper; measured, never judged) or not built.
"""

from tests.parity.suite import check_directory

__all__ = ["check_directory"]
