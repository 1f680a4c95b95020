"""llama.cpp's programs and library, built to compare with."""
