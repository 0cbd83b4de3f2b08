"""What these tests share with those of the method."""

from tests.conftest import _restore_defaults, device, mnist_root, toy, toy_on_device  # noqa: F401
