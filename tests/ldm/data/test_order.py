from ldm.data.loader import image_index


def test_every_epoch_visits_every_image_once_in_an_order_of_its_own():
    epochs = [[image_index(0, 50, k) for k in range(e * 50, e * 50 + 50)] for e in range(3)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_the_order_depends_on_the_seed_and_k_alone():
    forward = [image_index(5, 30, k) for k in range(90)]
    backward = [image_index(5, 30, k) for k in reversed(range(90))]
    assert forward == backward[::-1]
    assert forward != [image_index(6, 30, k) for k in range(90)]
