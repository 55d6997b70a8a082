"""What a reproduction shows: tables, figures and pages as functions of an item and of what was found for it. Nothing is measured here."""
