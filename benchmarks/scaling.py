def scaling_text(found):
    return []
