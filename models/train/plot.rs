//! The loss curve as a picture.

use super::{canvas::Canvas, metrics::Record};
use image::RgbImage;
use plotters::prelude::*;
use smalti::{Error, Result};

const SIZE: (u32, u32) = (960, 540);

/// Mean loss over epochs. The axis of the loss is logarithmic if it falls by more than a factor of 20.
///
/// # Errors
/// If there are fewer than two finite values.
pub fn loss_curve(records: &[Record], title: &str) -> Result<RgbImage> {
    let points: Vec<(f64, f64)> =
        records.iter().map(|r| (r.epoch, r.loss)).filter(|(_, loss)| loss.is_finite()).collect();
    let [first, .., last] = points[..] else {
        return Err(Error::msg("loss curve: needs two values at least"));
    };
    let low = points.iter().fold(f64::INFINITY, |m, p| m.min(p.1));
    let high = points.iter().fold(f64::NEG_INFINITY, |m, p| m.max(p.1));
    let margin = ((high - low) * 0.05).max(high.abs() * 1e-3 + 1e-9);
    let epochs = first.0..last.0.max(first.0 + 1e-6);
    let mut image = RgbImage::from_pixel(SIZE.0, SIZE.1, image::Rgb([255; 3]));
    let area = Canvas(&mut image).into_drawing_area();
    let mut chart = ChartBuilder::on(&area);
    chart.caption(title, ("", 24)).margin(20).x_label_area_size(44).y_label_area_size(84);
    if low > 0.0 && high / low > 20.0 {
        let chart = chart.build_cartesian_2d(epochs, (low * 0.9..high * 1.1).log_scale());
        draw(chart.map_err(failed)?, &points)?;
    } else {
        let chart = chart.build_cartesian_2d(epochs, low - margin..high + margin);
        draw(chart.map_err(failed)?, &points)?;
    }
    drop(area);
    Ok(image)
}

fn draw<Y>(mut chart: Chart<'_, '_, Y>, points: &[(f64, f64)]) -> Result<()>
where
    Y: plotters::coord::ranged1d::ValueFormatter<f64> + Ranged<ValueType = f64>,
{
    chart
        .configure_mesh()
        .light_line_style(RGBColor(240, 240, 240))
        .bold_line_style(RGBColor(210, 210, 210))
        .x_desc("epoch")
        .x_labels(10)
        .y_labels(8)
        .y_label_formatter(&|loss| short(*loss))
        .x_label_formatter(&|epoch| short(*epoch))
        .label_style(("", 16))
        .draw()
        .map_err(failed)?;
    let line = ShapeStyle::from(&RGBColor(20, 90, 180)).stroke_width(2);
    chart.draw_series(LineSeries::new(points.iter().copied(), line)).map_err(failed)?;
    Ok(())
}

type Chart<'a, 'b, Y> = ChartContext<'a, Canvas<'b>, Cartesian2d<plotters::coord::types::RangedCoordf64, Y>>;

/// Four significant digits, without trailing zeros.
fn short(value: f64) -> String {
    let magnitude = if value == 0.0 { 0.0 } else { value.abs().log10().floor() };
    let text = format!("{value:.*}", (3.0 - magnitude).clamp(0.0, 8.0) as usize);
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text }
}

fn failed(error: impl std::fmt::Display) -> Error {
    Error::msg(format!("loss curve: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn records(loss: impl Fn(u64) -> f64) -> Vec<Record> {
        let record = |step| Record {
            step,
            epoch: step as f64 / 10.0,
            loss: loss(step),
            lr: 0.1,
            monitored: Default::default(),
            images_per_second: 1.0,
            seconds: 1.0,
        };
        (1..=100).map(record).collect()
    }

    #[test]
    fn curves_are_drawn() {
        for loss in [&(|s: u64| 1.0 / s as f64) as &dyn Fn(u64) -> f64, &|_| 0.5, &|s| -(s as f64), &|s| {
            0.3f64.powi(s as i32)
        }] {
            let image = loss_curve(&records(loss), "loss").unwrap();
            let blue = image.pixels().filter(|p| p.0 == [20, 90, 180]).count();
            assert!(blue > 300, "{blue} pixels of the curve");
        }
        assert!(loss_curve(&records(|_| f64::NAN), "loss").is_err());
        assert!(loss_curve(&[], "loss").is_err());
    }

    #[test]
    fn numbers_are_short() {
        let shown: Vec<String> = [0.0, 0.05, 0.123456, 12.0, 1234.5, -0.5, 400.0].map(short).into();
        assert_eq!(shown, ["0", "0.05", "0.1235", "12", "1234", "-0.5", "400"]);
    }
}
