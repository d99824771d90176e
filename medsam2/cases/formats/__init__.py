"""File formats, one file each; every reader raises `CaseError` naming the file and never unpickles."""
