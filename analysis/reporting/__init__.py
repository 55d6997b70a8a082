"""What people read: tables, figures, pages and sentences made of results."""
