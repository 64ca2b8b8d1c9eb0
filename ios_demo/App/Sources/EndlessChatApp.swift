import ChatCore
import ChatUI
import SwiftUI

@main
struct EndlessChatApp: App {
    @UIApplicationDelegateAdaptor(AppDelegate.self) private var delegate
    @State private var start = Start()

    var body: some Scene {
        WindowGroup {
            switch start.result {
            case .success(let chat):
                ChatScreen(chat)
                    .task { await start.resume() }
                    .task { await chat.run() }
                    .onChange(of: chat.current?.id) { _, id in start.lastModel = id }
            case .failure(let error):
                ContentUnavailableView(
                    "start.failed", systemImage: "exclamationmark.triangle", description: Text(error.localizedDescription))
            }
        }
    }
}

/// What the app begins with: its folders, and the model of the last time.
@MainActor
struct Start {
    let result: Result<ChatModel, any Error>

    init() {
        result = Result {
            let files = FileManager.default
            var folder = try files.url(
                for: .applicationSupportDirectory, in: .userDomainMask, appropriateFor: nil, create: true)
            // models can be had again, and the cache of a conversation is large
            var values = URLResourceValues()
            values.isExcludedFromBackup = true
            try folder.setResourceValues(values)
            return try ChatModel(folder: folder, system: AppleSystem(), source: AppDelegate.downloads.get())
        }
    }

    var lastModel: String? {
        get { UserDefaults.standard.string(forKey: "lastModel") }
        nonmutating set { UserDefaults.standard.set(newValue, forKey: "lastModel") }
    }

    /// After a launch, also one after the app was killed: the conversation goes on where it was saved.
    func resume() async {
        guard case .success(let chat) = result, chat.current == nil,
            let entry = chat.models.first(where: { $0.id == lastModel })
        else { return }
        await chat.open(entry)
    }
}

/// Downloads go on while the app is suspended; the system wakes it when they are done.
final class AppDelegate: NSObject, UIApplicationDelegate {
    static let downloads = Result { try HubDownloads(identifier: "dev.edgestream.endlesschat.downloads") }

    func application(
        _ application: UIApplication, handleEventsForBackgroundURLSession identifier: String,
        completionHandler: @escaping () -> Void
    ) {
        guard case .success(let downloads) = Self.downloads else { return completionHandler() }
        nonisolated(unsafe) let done = completionHandler
        downloads.whenIdle { done() }
    }
}
