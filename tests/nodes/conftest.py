from tests.fake_comfy.fixture import double

__all__ = ["double"]
