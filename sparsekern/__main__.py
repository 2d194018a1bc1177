"""Entry point of ``sparsekern`` and ``python -m sparsekern``."""

import sys


def main() -> None:
    """Run the command line, or say what it needs."""
    try:
        from sparsekern.cli import app
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("sparsekern"):
            raise
        sys.exit(f"the command line needs `pip install 'sparsekern[cli]'` (no module named {error.name})")
    app()


if __name__ == "__main__":
    main()
