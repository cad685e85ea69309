"""Pictures as published model families take them: pixels, tiles, token counts and prompt text."""
