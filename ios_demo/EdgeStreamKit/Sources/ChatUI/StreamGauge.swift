#if canImport(SwiftUI)
    import ChatCore
    import SwiftUI

    /// What shows that the conversation costs no more after a week than after a minute: tokens seen grow, cache and
    /// memory do not.
    struct StreamGauge: View {
        let gauge: Gauge
        let phase: ChatState.Phase
        @Environment(\.dynamicTypeSize) private var typeSize

        var body: some View {
            let layout =
                typeSize.isAccessibilitySize
                ? AnyLayout(VStackLayout(alignment: .leading)) : AnyLayout(HStackLayout(spacing: 16))
            VStack(alignment: .leading, spacing: 4) {
                ProgressView(value: gauge.fill)
                    .accessibilityLabel(localized("gauge.cache"))
                    .accessibilityValue(localized("gauge.cacheValue \(gauge.cached) \(gauge.contextSize)"))
                layout {
                    Figure(label: localized("gauge.seen"), value: gauge.seen.formatted())
                    Figure(
                        label: localized("gauge.speed"),
                        value: gauge.tokensPerSecond.formatted(.number.precision(.fractionLength(1))))
                    if let footprint = gauge.footprint {
                        Figure(
                            label: localized("gauge.memory"),
                            value: Int64(clamping: footprint).formatted(.byteCount(style: .memory)))
                    }
                    Figure(label: localized("gauge.heat"), value: gauge.thermal.name)
                }
                Text(phase.name)
                    .font(.caption)
                    .foregroundStyle(.secondary)
            }
            .padding(.horizontal)
            .padding(.vertical, 8)
            .background(.bar)
        }
    }

    private struct Figure: View {
        let label: String
        let value: String

        var body: some View {
            VStack(alignment: .leading) {
                Text(label)
                    .font(.caption2)
                    .foregroundStyle(.secondary)
                Text(value)
                    .font(.caption.monospacedDigit())
            }
            .accessibilityElement(children: .combine)
        }
    }
#endif
