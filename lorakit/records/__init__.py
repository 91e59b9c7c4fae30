"""Records: what goes between the commands, with their conversations and completions."""
