"""From statistics to a verdict, tables and figures, and from these to HTML, Markdown and the terminal."""
