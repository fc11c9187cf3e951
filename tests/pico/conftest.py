from tests.pico.autoencoders import reader, vae

__all__ = ["reader", "vae"]
