"""What these tests share with those of the method."""

from tests.conftest import _restore_defaults, mnist_root, pytest_runtest_call, smooth, toy  # noqa: F401
