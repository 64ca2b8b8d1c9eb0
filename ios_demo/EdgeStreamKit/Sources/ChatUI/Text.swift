#if canImport(SwiftUI)
    import ChatCore
    import SwiftUI

    /// Texts of this package's string table.
    func localized(_ key: String.LocalizationValue) -> String {
        String(localized: key, bundle: .module)
    }

    extension ChatState.Notice {
        var sentence: String {
            switch self {
            case .tooHot: localized("notice.tooHot")
            case .memoryShort: localized("notice.memoryShort")
            case .smallerCache(let size): localized("notice.smallerCache \(size)")
            case .sessionLost(let name): localized("notice.sessionLost \(name)")
            case .failure(let sentence): sentence
            }
        }
    }

    extension ThermalLevel {
        var name: String {
            switch self {
            case .nominal: localized("thermal.nominal")
            case .fair: localized("thermal.fair")
            case .serious: localized("thermal.serious")
            case .critical: localized("thermal.critical")
            }
        }
    }

    extension ChatState.Phase {
        var name: String {
            switch self {
            case .noModel: localized("phase.noModel")
            case .loading(let share): localized("phase.loading \(Int(share * 100))")
            case .idle: localized("phase.idle")
            case .reading(let done, let total) where total > 0: localized("phase.reading \(done) \(total)")
            case .reading: localized("phase.thinking")
            case .writing: localized("phase.writing")
            case .suspended: localized("phase.suspended")
            }
        }
    }
#endif
