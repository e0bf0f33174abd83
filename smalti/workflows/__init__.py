"""One function per verb, over everything below. The command line only translates flags into these calls."""
