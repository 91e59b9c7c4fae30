"""Raw files of every form to rows: one reader a form."""
