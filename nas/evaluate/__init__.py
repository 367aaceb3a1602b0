"""What a deployed file answers: its classes on images, its accuracy, and how it compares with other files."""
