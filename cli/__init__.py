"""The commands marlin-quantize and marlin-eval: the only code that prints, reads the environment or exits."""
