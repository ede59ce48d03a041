"""Reports of finished runs: tables, pictures, verdicts, HTML pages, model cards."""
