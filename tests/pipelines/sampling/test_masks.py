import torch

from pipelines.sampling.settings import fill_hidden, latent_mask


def test_hidden_pixels_are_the_mean_of_the_known_ones_about_them():
    images = torch.arange(16.0).view(1, 1, 4, 4).expand(1, 3, 4, 4) / 16
    mask = torch.zeros(1, 1, 4, 4)
    mask[..., 0, 0] = 1  # its square of 2 knows 1, 4 and 5
    mask[..., 2:, 2:] = 1  # a square of 2 that knows nothing: the mean of the other three
    filled = fill_hidden(images, mask)
    assert torch.equal(torch.where(mask > 0, 0, filled), torch.where(mask > 0, 0, images))
    assert torch.allclose(filled[0, :, 0, 0], torch.tensor((1 + 4 + 5) / 3 / 16))
    # all eleven count alike, however many of a square of 2 there are
    eleven = (1 + 4 + 5) + (2 + 3 + 6 + 7) + (8 + 9 + 12 + 13)
    assert torch.allclose(filled[0, :, 2:, 2:], torch.tensor(eleven / 11 / 16))


def test_it_is_the_mean_over_the_smallest_square_that_knows_a_pixel():
    """Square by square, on sides that are no powers of 2."""
    torch.manual_seed(0)
    images, mask = torch.rand(1, 3, 11, 6), (torch.rand(1, 1, 11, 6) < 0.95).float()
    filled = fill_hidden(images, mask)
    for row in range(11):
        for column in range(6):
            side, at = 1, (..., slice(row, row + 1), slice(column, column + 1))
            while mask[at].all():
                side *= 2
                top, left = row // side * side, column // side * side
                at = (..., slice(top, top + side), slice(left, left + side))
            known = mask[at] == 0
            mean = images[at][known.expand_as(images[at])].view(3, -1).mean(1)
            assert torch.allclose(filled[0, :, row, column], mean)


def test_a_constant_picture_is_filled_with_its_colour_whatever_the_size():
    torch.manual_seed(0)
    for sides in ((13, 7), (1, 5), (32, 32)):
        mask = (torch.rand(2, 1, *sides) < 0.8).float()
        mask[..., 0, 0] = 0
        images = torch.full((2, 3, *sides), 0.3)
        assert torch.allclose(fill_hidden(images, mask), images)


def test_hidden_values_do_not_matter_and_nothing_known_is_grey():
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., 2:7, 1:6] = 1
    images = torch.rand(1, 3, 8, 8)
    changed = torch.where(mask > 0, -images, images)
    assert torch.equal(fill_hidden(images, mask), fill_hidden(changed, mask))
    assert (fill_hidden(images, torch.ones_like(mask)) == 0).all()


def test_a_latent_is_hidden_where_any_of_its_pixels_is():
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 7, 8] = 1
    assert torch.equal(latent_mask(mask, (2, 2)), torch.tensor([[[[0.0, 1.0], [0.0, 0.0]]]]))
