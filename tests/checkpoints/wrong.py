"""What is known to be wrong; the mark goes when it is right (strict: it cannot stay)."""

import pytest


def wrong(reason: str) -> pytest.MarkDecorator:
    """Mark of a test that fails because `reason`."""
    return pytest.mark.xfail(strict=True, reason=reason)
