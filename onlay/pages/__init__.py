"""What every page has in common: drawings, style, and the manners of a page that runs nothing and fetches nothing."""
