"""What a run says when it is done: tables, pictures, verdicts, pages, cards."""
